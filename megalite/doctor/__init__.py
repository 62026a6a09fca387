"""Checks of the launcher, the hosts, their network, devices and disk before training, in under a minute.

- `report`: the result, a row per check, and its table on the console. It does not import torch.
- `hosts`: the ranks with their hosts and devices.
- `connectivity`: whether the ranks can connect to each other, tested with plain sockets: a process group that cannot
  form does not say which connection failed.
- `bandwidth`: message rates along each axis of the layout, and the rate of matrix products.
- `disk`: free space and write rate in the run's folder.
- `checks`: all checks of one rank, in order.
"""
