"""`snowskin doctor`: can this host run Snowskin, what is wrong, and what to do."""
