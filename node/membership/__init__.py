"""The members of the site, and how they find each other."""
