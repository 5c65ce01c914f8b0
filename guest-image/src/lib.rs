//! Makes the guests that rhyve boots: the probe kernel and Linux images
