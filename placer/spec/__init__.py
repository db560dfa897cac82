"""What the user states: units, cluster, model, workload, requirements, problem."""
