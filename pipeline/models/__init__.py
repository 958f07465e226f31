"""The VAEs and the classifier. They open no files and import only `nn` and `schema`."""
