//! Both transports against drivers good and bad.
