"""What sections of settings are made of: `section` and its kinds of `values`, and `validation`, which reports faults.

The run file, the DeepSpeed JSON and the configurations of model families are made of sections.
"""
