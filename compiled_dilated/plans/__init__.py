"""Plans as values: problems, proposals and refusals of lowerings, costs.

problems   Problem: a program and the shapes of a call
proposals  Proposal or Refusal of a lowering, with its Cost
plan       Plan: the chosen proposals and all that were weighed
printing   the parts of a printed plan
cache      PlanCache: plans by value
"""

from .cache import PlanCache
from .plan import Plan
from .problems import Problem, Scores, problem_of
from .proposals import Cost, Proposal, Refusal

__all__ = [
    "Cost",
    "Plan",
    "PlanCache",
    "Problem",
    "Proposal",
    "Refusal",
    "Scores",
    "problem_of",
]
