"""All that is measured, and all that is wanted."""
import by_nbd
import cases
import goals


def all_cases():
    """In the order of the tables."""
    return cases.all_cases() + by_nbd.all_cases()


def all_goals():
    """In the order of the cases."""
    return goals.all_goals() + by_nbd.all_goals()
