"""The pure core: from what is needed to who reads what when. Data in, data out."""
