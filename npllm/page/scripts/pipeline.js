// The pipeline is written by its template.
