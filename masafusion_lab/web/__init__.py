"""Behind the annotation lab's page: one computation at a time, people's folders, the form, and what each press does."""
