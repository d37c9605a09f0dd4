"""The learner: losses, optimisers, diagnostics, and how learners are fed."""
