mod bench;
mod contents;
mod hostile;
mod operations;
