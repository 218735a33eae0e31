package main

import (
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"lazuli/fs/rootfs"
)

func newImagesCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List the images that this node keeps",
		Long: `Images lists what was mounted or run here, the last used first: the size of each image's files, each content once, and
the share of them that is here. Files that images have in common are here once and count for each.`,
		Example: `  lazuli images
  lazuli images --json`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(cmd, func(node *rootfs.Node) error {
				images, err := node.Images()
				if err != nil {
					return err
				}
				if asJSON {
					if images == nil {
						images = []rootfs.Image{}
					}
					return writeJSON(cmd.OutOrStdout(), images)
				}
				w := tabwriter.NewWriter(printable(cmd.OutOrStdout()), 0, 0, 2, ' ', 0)
				fmt.Fprintln(w, "IMAGE\tDIGEST\tFILES\tHERE\tUSED\t")
				for _, im := range images {
					share, used := 100.0, im.Used.Local().Format(time.DateTime)
					if im.Bytes > 0 {
						share = 100 * float64(im.BytesHere) / float64(im.Bytes)
					}
					if im.InUse {
						used = "now"
					}
					fmt.Fprintf(w, "%s\t%s\t%s\t%s (%.0f %%)\t%s\t\n", im.Reference, shortDigest(im.Digest), size(im.Bytes), size(im.BytesHere), share, used)
				}
				return w.Flush()
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func newRmiCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "rmi IMAGE…",
		Short: "Let go of images",
		Long: `Rmi forgets images and removes what only they needed from the disk. IMAGE is a name as lazuli images prints it, or a digest
or the beginning of one. An image that is mounted stays.`,
		Example: `  lazuli rmi localhost:5000/python:lazy
  lazuli rmi 3f8a21`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(cmd, func(node *rootfs.Node) error {
				var errs []error
				for _, name := range args {
					images, err := node.Images()
					if err != nil {
						return err
					}
					ref, err := rootfs.Find(images, name)
					if err == nil {
						var freed int64
						if freed, err = node.Remove(ref); err == nil {
							fmt.Fprintf(cmd.OutOrStdout(), "%s removed, %s free\n", ref, size(freed))
							continue
						}
					}
					errs = append(errs, err)
				}
				return errors.Join(errs...)
			})
		},
	}
}

func newPruneCommand(a *app) *cobra.Command {
	return &cobra.Command{
		Use:     "prune",
		Short:   "Remove from the disk what no image needs",
		Long:    `Prune removes what no image of lazuli images needs: what was fetched for images that are forgotten, and what ended halfway.`,
		Example: "  lazuli prune",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.withNode(cmd, func(node *rootfs.Node) error {
				freed, err := node.Prune()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s free\n", size(freed))
				return err
			})
		},
	}
}

// withNode opens the node for as long as f runs.
func (a *app) withNode(cmd *cobra.Command, f func(*rootfs.Node) error) (err error) {
	node, err := a.open(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	return f(node)
}
