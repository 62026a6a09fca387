"""The torch engine: ZeRO stages 0 to 3 by torch's fully_shard (FSDP2), under any pipeline schedule."""
