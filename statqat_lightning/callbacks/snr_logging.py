"""What loggers are told about a quantized training: names of scalars, tables, pictures, alerts.

Every logger gets scalars. W&B gets tables, pictures, histograms, a summary, the configuration,
alerts and artifacts besides; TensorBoard gets histograms, figures and text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from statqat_lightning.callbacks.lightning_names import is_a
from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.insight.snr import OutputErrors, SNRSummary, tensor_column
from statqat_lightning.insight.spectrum_bars import spectrum_bars
from statqat_lightning.insight.tensor_facts import GridFigures, TensorFacts

PREFIX = "snr_db"
TABLE = "statqat/layers"
HEAT_MAP = "statqat/snr_heat_map"
WORST_CURVES = "statqat/worst_error_curves"
CONFIG = "statqat"
TABLE_COLUMNS = (
    *("tensor", "layer", "type", "format", "bits", "parameters", "snr_db", "predicted_snr_db"),
    *("output_snr_db", "made_db", "inherited_db", "total_db"),
    *("clipped", "grid_used", "outer_energy", "scale", "scale_moved_octaves"),
)


class SNRMonitorWarning(UserWarning):
    """There is no SNR to log, or it has fallen."""


def scalar_name(prefix: str, tensor: str) -> str:
    """The name of a scalar of a tensor: loggers make a section of what is before the slash.

    Args:
        prefix: What it is, such as `snr_db`.
        tensor: `{layer}/{role}`.

    Examples:
        >>> scalar_name("snr_db", "layer1.0.conv1/input")
        'snr_db_input/layer1.0.conv1'
        >>> scalar_name("snr_db", "encoder.attention/in_proj_weight")
        'snr_db_weight/encoder.attention.in_proj_weight'
    """
    layer, _, role = tensor.rpartition("/")
    kind = tensor_column(role)
    own = role if role != kind or not layer else ""
    return f"{prefix}_{kind}/{'.'.join(filter(None, (layer, own)))}"


def aggregates(summary: SNRSummary) -> dict[str, float]:
    """Mean and minimum over all tensors."""
    return {f"{PREFIX}/mean": summary.mean, f"{PREFIX}/min": summary.min}


def scalars(
    decibels: Mapping[str, float],
    of_outputs: Mapping[str, float],
    figures: Mapping[str, GridFigures],
) -> dict[str, float]:
    """The scalars of every tensor at one step."""
    found = {scalar_name(PREFIX, name): value for name, value in decibels.items()}
    found |= {scalar_name("output_snr_db", name): value for name, value in of_outputs.items()}
    for name, of_grid in figures.items():
        found[scalar_name("scale", name)] = of_grid.scale
        if not math.isnan(of_grid.clipped):
            found[scalar_name("clipped", name)] = of_grid.clipped
    return found


def error_scalars(errors: Mapping[str, OutputErrors]) -> dict[str, float]:
    """The scalars of the outputs of layers, on one batch."""
    return {
        f"layer_output_{part}_db/{name or 'model'}": getattr(error, part)
        for part in ("made", "inherited", "total")
        for name, error in errors.items()
    }


def log_scalars(
    loggers: Iterable[Any], metrics: Mapping[str, float], step: int, worst: str = ""
) -> None:
    """Hand scalars to every logger; W&B takes the name of the worst tensor, too."""
    for logger in loggers:
        own: dict[str, Any] = dict(metrics)
        if worst and is_a(logger, "WandbLogger"):
            own[f"{PREFIX}/worst_layer"] = worst
        # Directly: `self.log` for hundreds of layers costs more than a training step.
        logger.log_metrics(own, step=step)


def log_configuration(loggers: Iterable[Any], configuration: Mapping[str, Any]) -> None:
    """Let runs be compared by recipe, formats, target and schedule.

    Other loggers keep it as hyperparameters, flat, beside those of the user.
    """
    text = yaml.safe_dump(dict(configuration), sort_keys=False)
    for logger in loggers:
        if is_a(logger, "WandbLogger"):
            logger.experiment.config.update({CONFIG: dict(configuration)}, allow_val_change=True)
        elif is_a(logger, "TensorBoardLogger"):
            # Its hyperparameters come with a metric of their own, which is the user's to choose.
            logger.experiment.add_text("statqat/configuration", f"```\n{text}```", 0)
        else:
            try:
                logger.log_hyperparams({CONFIG: dict(configuration)})
            except Exception as error:  # whatever its service says: no reason to end a training
                rank_zero_warn(
                    f"SNRMonitor: {type(logger).__name__} did not take the configuration "
                    f"({type(error).__name__}: {error}).",
                    category=SNRMonitorWarning,
                )


def table_rows(
    facts: Mapping[str, TensorFacts],
    errors: Mapping[str, OutputErrors],
    first_scales: Mapping[str, float],
) -> list[list[Any]]:
    """A row for each tensor, numbers as numbers, as `TABLE_COLUMNS` names them."""
    rows = []
    for name, own in facts.items():
        of_layer = errors.get(own.layer)
        parts = [None] * 3
        if of_layer is not None and tensor_column(own.role) == "weight":
            parts = [of_layer.made, of_layer.inherited, of_layer.total]  # type: ignore[list-item]
        moved = math.log2(own.scale / first_scales.get(name, own.scale))
        row = [name, own.layer, own.layer_type, own.format, own.bits, own.parameters]
        row += [own.snr_db, own.predicted_snr_db, own.output_snr_db, *parts]
        row += [own.clipped, own.grid_used, own.outer_energy, own.scale, moved]
        rows.append([_finite(cell) for cell in row])
    return rows


def _finite(cell: Any) -> Any:
    """A cell for a table; numbers that are none would make a column one of texts."""
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


class EpochLog:
    """What loggers with more than scalars get at the end of an epoch.

    Args:
        loggers: The Trainer's loggers.
        step: The step of the scalars beside it.
    """

    def __init__(self, loggers: Sequence[Any], step: int) -> None:
        self._wandb = [logger for logger in loggers if is_a(logger, "WandbLogger")]
        self._boards = [logger for logger in loggers if is_a(logger, "TensorBoardLogger")]
        self._step = step

    @property
    def is_wanted(self) -> bool:
        """Whether there is a logger that takes more than scalars."""
        return bool(self._wandb or self._boards)

    def table(self, rows: Sequence[Sequence[Any]]) -> None:
        """The table of all tensors."""
        columns = [*TABLE_COLUMNS]
        for logger in self._wandb:
            data = [[*row] for row in rows]
            logger.log_table(TABLE, columns=columns, data=data, step=self._step)
        lines = [columns, ["---"] * len(columns), *rows]
        text = "\n".join("| " + " | ".join(map(_cell_text, line)) + " |" for line in lines)
        for logger in self._boards:
            logger.experiment.add_text(TABLE, text, self._step)

    def picture(self, name: str, figure: Any) -> None:
        """A figure of matplotlib."""
        for logger in self._wandb:
            from wandb import Image

            logger.experiment.log({name: Image(figure), "trainer/global_step": self._step})
        for logger in self._boards:
            logger.experiment.add_figure(name, figure, self._step, close=False)

    def spectrum(self, tensor: str, spectrum: EnergySpectrum) -> dict[str, Any]:
        """The histogram of a spectrum: W&B's, to be logged with others; TensorBoard gets it now."""
        name = scalar_name("spectrum", tensor)
        bars = spectrum_bars(spectrum)
        for logger in self._boards:
            _add_histogram(logger.experiment, name, bars.edges, bars.shares, self._step)
        if not self._wandb:
            return {}
        import numpy as np
        from wandb import Histogram

        return {name: Histogram(np_histogram=(np.array(bars.shares), np.array(bars.edges)))}

    def histograms(self, found: Mapping[str, Any]) -> None:
        """The histograms of all spectra, for W&B."""
        for logger in self._wandb:
            logger.experiment.log({**found, "trainer/global_step": self._step})

    def summary(self, summary: SNRSummary, lowest: tuple[float, str, int]) -> None:
        """The last and the worst values of the run.

        Args:
            summary: Of the last step that was logged.
            lowest: The lowest SNR of the run, its tensor and its step.
        """
        for logger in self._wandb:
            own = logger.experiment.summary
            own[f"{PREFIX}/last_mean"] = summary.mean
            own[f"{PREFIX}/last_min"] = summary.min
            own[f"{PREFIX}/last_worst_layer"] = summary.worst
            own[f"{PREFIX}/five_worst"] = [f"{name} {db:.1f} dB" for name, db in summary.five_worst]
            for key, value in zip(("", "_layer", "_step"), lowest, strict=True):
                own[f"{PREFIX}/lowest{key}"] = value


def _cell_text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "" if cell is None else str(cell).replace("|", "\\|")


def _add_histogram(
    writer: Any, name: str, edges: Sequence[float], shares: Sequence[float], step: int
) -> None:
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    writer.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=sum(shares),
        sum=sum(s * x for s, x in zip(shares, middles, strict=True)),
        sum_squares=sum(s * x * x for s, x in zip(shares, middles, strict=True)),
        bucket_limits=[*edges[1:]],
        bucket_counts=[*shares],
        global_step=step,
    )


def alert(loggers: Iterable[Any], fallen: Mapping[str, tuple[float, float]], step: int) -> None:
    """Say that SNRs have fallen: as a warning, and as an alert of W&B.

    Args:
        loggers: The Trainer's loggers.
        fallen: The best SNR so far and the present one, in dB, by tensor.
        step: When that was seen.
    """
    worst = sorted(fallen.items(), key=lambda entry: entry[1][1] - entry[1][0])
    lines = [f"{name} from {best:.1f} to {now:.1f} dB" for name, (best, now) in worst]
    more = f", and {len(lines) - 5} more" if len(lines) > 5 else ""
    text = f"at step {step} the SNR fell: {', '.join(lines[:5])}{more}."
    rank_zero_warn(f"SNRMonitor: {text}", category=SNRMonitorWarning)
    for logger in loggers:
        if is_a(logger, "WandbLogger"):
            logger.experiment.alert(title="SNR has fallen", text=text)


def log_files(
    loggers: Iterable[Any], paths: Sequence[Path], name: str, kind: str = "model"
) -> None:
    """Keep files as an artifact of W&B, of a name and a kind."""
    present = [path for path in paths if path.exists()]
    for logger in loggers:
        if present and is_a(logger, "WandbLogger"):
            from wandb import Artifact

            artifact = Artifact(name, type=kind)
            for path in present:
                add = artifact.add_dir if path.is_dir() else artifact.add_file
                add(str(path), name=path.name)
            logger.experiment.log_artifact(artifact)
