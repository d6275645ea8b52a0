"""What of a torch layer can be quantized, and the classes that do it in place.

In comes a module; out comes the same object, whose class has become a subclass that fake-quantizes
weights, inputs, outputs and results of functions in its forward. Names, parameters and
`state_dict` stay as they were.
"""
