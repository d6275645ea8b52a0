"""One self-contained HTML page of a report, from plain data.

In comes what `ReportData.to_dict` returns; out comes a page with tables that a browser shows
without a script, and the data with the script that draws pictures from it. It loads nothing.
"""

from statqat_lightning._page.build import page as page
