"""What other programs, people and models wrote: read with bounds and types checked, and shown harmlessly."""
