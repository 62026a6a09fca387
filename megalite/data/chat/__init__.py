"""Records of conversations, and the chat template that turns them into token ids and a loss mask."""
