"""What can be told of a launcher, its hosts and their network before training, in under a minute.

- `report`: what was found, a row each, and the table on the console. No torch.
- `hosts`: who the ranks are, on which hosts and devices.
- `connectivity`: whether every rank can connect to every other, by plain sockets: a group that cannot form tells too
  little.
- `bandwidth`: messages along each axis of the layout, and matrix products.
- `disk`: room and rate in the run's folder.
- `checks`: one rank's part in all of them, in that order.
"""
