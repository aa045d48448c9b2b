mod bench;
mod hostile;
mod operations;
