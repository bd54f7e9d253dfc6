"""Moving the files of a domain to another folder."""
