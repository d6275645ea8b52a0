"""Quantization error: exact under a density, and predicted from the energy spectrum of data."""

from statqat_lightning.error_analysis.densities import Density as Density
from statqat_lightning.error_analysis.densities import density_names as density_names
from statqat_lightning.error_analysis.densities import get_density as get_density
from statqat_lightning.error_analysis.empirical import Samples as Samples
from statqat_lightning.error_analysis.exact import ExpectedError as ExpectedError
from statqat_lightning.error_analysis.exact import expected_error as expected_error
from statqat_lightning.error_analysis.exact import expected_mse as expected_mse
from statqat_lightning.error_analysis.exact import expected_snr_db as expected_snr_db
from statqat_lightning.error_analysis.exact import optimal_scale as optimal_scale
from statqat_lightning.error_analysis.spectrum import EnergySpectrum as EnergySpectrum
from statqat_lightning.error_analysis.spectrum import ErrorCurve as ErrorCurve
