"""A calibration as a table: measured steps next to planned ones, and what became of each constant."""

from rich.table import Table

from k25_train.plan.calibrate.calibrate import Calibrated
from k25_train.plan.calibrate.device_file import origin, overrides


def calibration_table(found: Calibrated) -> Table:
    """Every measurement, what plans said of it before and say now."""
    table = Table("run", "what", "measured", "planned before", "planned now", "off by", title_justify="left")
    for each in found.compared:
        measured = each.measured
        table.add_row(
            measured.run,
            measured.what,
            f"{measured.seconds:.4g} s ± {measured.noise:.1%}",
            f"{each.before_s:.4g} s",
            f"{each.after_s:.4g} s",
            f"{each.error:+.1%}",
        )
    return table


def calibration_lines(found: Calibrated) -> list[str]:
    """The constants, where each comes from, and the overrides to paste."""
    lines = [f"{name}: {each.value:.6g} ({origin(each)})" for name, each in found.constants.items()]
    worst = max(abs(each.error) for each in found.compared)
    return [*lines, f"plans of these runs are off by {worst:.1%} at most", "", " \\\n".join(overrides(found))]
