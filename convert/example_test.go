package convert_test

import (
	"context"
	"fmt"
	"log"

	"lazuli/convert"
	"lazuli/fs/remote"
)

func ExampleImage() {
	src, err := remote.ParseReference("docker.io/library/python:3.12")
	if err != nil {
		log.Fatal(err)
	}
	dst, err := remote.ParseReference("oci:/tmp/python:lazy")
	if err != nil {
		log.Fatal(err)
	}
	result, err := convert.Image(context.Background(), src, dst, convert.Options{})
	if err != nil {
		log.Fatal(err)
	}
	for _, l := range result.Layers {
		fmt.Println(l.Outcome, l.Source, l.Target)
	}
}
