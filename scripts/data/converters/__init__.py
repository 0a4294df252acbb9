"""From a data set as its owner publishes it to the datalist that training, evaluation and inference read."""
