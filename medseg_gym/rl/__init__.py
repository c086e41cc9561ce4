"""Language models as agents: what trains and serves them shares these modules."""
