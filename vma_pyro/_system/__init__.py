"""What any program needs of its machine: files, locks, processes, numbers; nothing here knows ours."""
