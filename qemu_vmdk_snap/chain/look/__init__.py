"""What is noticed besides the content: foreign files, locks of VMware, notes on faults."""
