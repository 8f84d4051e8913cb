"""Every method as one short file: `credit` and `loss` composed from the parts in `credit/` and `loss/`."""

from selftaught.methods.base import Method, build, method_class, method_fields, names
from selftaught.methods.check import checked
from selftaught.methods.objective import Objective, batch_credit, chunked_objective, objective
from selftaught.methods.several import Several

__all__ = ["Method", "Objective", "Several", "batch_credit", "build", "checked", "chunked_objective", "method_class",
           "method_fields", "names", "objective"]
