"""What the processes of an installation share through Redis: quick, and never the truth. Losing it costs speed."""
