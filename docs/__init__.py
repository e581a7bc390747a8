"""What the manual is made with, apart from its pages."""
