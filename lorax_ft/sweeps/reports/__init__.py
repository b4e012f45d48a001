"""Reports of a sweep: its tables, figures and page, made of what its runs left."""

from lorax_ft.sweeps.reports.report import write_report

__all__ = ["write_report"]
