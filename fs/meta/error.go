package meta

import "fmt"

// A LayerError says which of the layers given to [Merge] cannot be in an image, counted from 0, and why. Who knows the
// layer's digest says that instead of the number.
type LayerError struct {
	Layer int
	Err   error
}

func (e *LayerError) Error() string { return fmt.Sprintf("layer %d: %v", e.Layer, e.Err) }
func (e *LayerError) Unwrap() error { return e.Err }
