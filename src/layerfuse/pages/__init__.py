"""What all pages share: the frame with its one stylesheet and script, drawings, and numbers."""
