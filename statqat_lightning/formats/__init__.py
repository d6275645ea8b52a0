"""Number formats as data: a finite grid of values at scale 1, and how to round to it."""

from statqat_lightning.formats.base import Format as Format
from statqat_lightning.formats.blocks import E4M3 as E4M3
from statqat_lightning.formats.blocks import E8M0 as E8M0
from statqat_lightning.formats.blocks import BlockFormat as BlockFormat
from statqat_lightning.formats.codebooks import CodebookFormat as CodebookFormat
from statqat_lightning.formats.floats import FloatFormat as FloatFormat
from statqat_lightning.formats.integers import IntFormat as IntFormat
from statqat_lightning.formats.listing import FormatInfo as FormatInfo
from statqat_lightning.formats.listing import FormatTable as FormatTable
from statqat_lightning.formats.listing import list_formats as list_formats
from statqat_lightning.formats.names import at_least_bits as at_least_bits
from statqat_lightning.formats.names import block_format_names as block_format_names
from statqat_lightning.formats.names import format_names as format_names
from statqat_lightning.formats.names import get_format as get_format
from statqat_lightning.formats.names import unsigned as unsigned
from statqat_lightning.formats.shifted_floats import ShiftedFloatFormat as ShiftedFloatFormat
