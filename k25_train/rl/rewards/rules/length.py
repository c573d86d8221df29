"""How much longer than its budget a response is.

Source: K2, section 3.2: a budget of tokens per task, responses beyond it are penalised. How strongly is not
disclosed, our choice: straight from nothing at the budget to everything at twice the budget.
"""


def over_budget(num_tokens: int, budget_tokens: int) -> float:
    """0 within the budget, 1 from twice the budget on, straight between. A budget of 0 is no budget."""
    if budget_tokens <= 0:
        return 0.0
    return min(1.0, max(0.0, num_tokens / budget_tokens - 1))
