"""Where bnexp meets other people's training loops. Each module needs what it is named after."""
