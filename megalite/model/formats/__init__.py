"""How a family describes its models in the formats of other trainers; `convert` reads and writes by that."""
