"""The choice of passes for a step: candidates, tracing, estimates, budgets, the torch.compile backend, reports."""
