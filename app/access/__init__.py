"""Who may ask for how much, and on what terms: keys, quotas, the bounded queue, deadlines."""
