"""The journey of rows to the ranks of their experts and back: in messages, or one-sided."""
