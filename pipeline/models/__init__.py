"""The VAEs and the classifier. They open no files and import only `nn`, `storage`, `distributed`, `schema`."""
