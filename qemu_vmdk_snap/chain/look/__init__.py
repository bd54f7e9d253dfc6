"""What is noticed beside the content: foreign files, locks of VMware, notes for whoever reads."""
