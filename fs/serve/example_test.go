package serve_test

import (
	"fmt"

	"golang.org/x/sys/unix"

	"lazuli/fs/fetch"
	"lazuli/fs/serve"
)

// A keeper holds what a server leaves when it dies, a descriptor and the first request, and another server goes on.
func ExampleResume() {
	goOn := func(q *fetch.Queue) error {
		first, err := serve.Mount("/run/lazuli/objects", q, nil)
		if err != nil {
			return err
		}
		kept, err := unix.Dup(int(first.File().Fd()))
		if err != nil {
			return err
		}
		init := first.Init()
		if err := first.Stop(); err != nil { // or it is killed
			return err
		}
		second, err := serve.Resume(kept, init, q, nil)
		if err != nil {
			return err
		}
		return second.Wait() // until somebody unmounts it
	}
	fmt.Println(goOn != nil)
	// Output: true
}
