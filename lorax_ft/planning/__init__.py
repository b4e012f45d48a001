"""Plans: what a run takes of a device, asked of the device's own compiler before it is rented."""

from lorax_ft.planning.figure import plot_plans
from lorax_ft.planning.plan import Plan, Roofline, make_plan
from lorax_ft.planning.report import largest_text, plan_text, suggestions_text, verdict
from lorax_ft.planning.search import Largest, largest
from lorax_ft.planning.suggestions import SUGGESTIONS, Suggested, Suggestion, Trial, suggest
from lorax_ft.planning.targets import (
    Compiler,
    Target,
    compiler,
    missing,
    parse_target,
    prepare_process,
)

__all__ = [
    "SUGGESTIONS",
    "Compiler",
    "Largest",
    "Plan",
    "Roofline",
    "Suggested",
    "Suggestion",
    "Target",
    "Trial",
    "compiler",
    "largest",
    "largest_text",
    "make_plan",
    "missing",
    "parse_target",
    "plan_text",
    "plot_plans",
    "prepare_process",
    "suggest",
    "suggestions_text",
    "verdict",
]
