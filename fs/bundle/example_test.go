package bundle_test

import (
	"context"
	"fmt"
	"os"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/bundle"
)

// A mounted root and its image's config become a container that runs to its end.
func Example() {
	run := func(root string, config *v1.ConfigFile) (code int, err error) {
		spec, err := bundle.Config(config, root, bundle.Options{Args: []string{"python3", "--version"}, Env: []string{"LANG=C"}})
		if err != nil {
			return 0, err
		}
		return bundle.Run(context.Background(), "/run/lazuli/bundles", spec, bundle.IO{Stdout: os.Stdout, Stderr: os.Stderr})
	}
	fmt.Println(run != nil)
	// Output: true
}
