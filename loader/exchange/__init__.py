"""Between ranks: agreeing on errors and results, and moving boxes."""
