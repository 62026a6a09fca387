"""AdamW over a rank's parameters, the learning-rate schedules, and what an optimizer step did."""
