"""Host memory that a device copies from and to: page-locked regions, copies, state that streams through."""
