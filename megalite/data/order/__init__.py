"""Which sample comes when: streaming and Megatron orders, blends of sources, and their digest."""
