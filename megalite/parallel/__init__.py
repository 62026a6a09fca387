"""The process mesh, and the arithmetic of which rank holds what.

`layout` gives each rank its coordinate on the axes; `placement` says which pipeline rank holds which stages; `mesh`
forms the process groups. `sharding` says which slice of a global tensor a rank holds; `regions` turns ranges of flat
elements into regions of tensors; `json_collectives` sends JSON values between ranks. `layout`, `placement`, `sharding`
and `regions` import no torch.
"""
