"""The backbones by name; what they share is in `core.model.backbone`."""
